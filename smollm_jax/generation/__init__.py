"""Text generation: `programs` run on the device, `sampling` chooses tokens, `generate` loops over steps with token ids,
and `engine` goes from text to text and stops at stop strings."""
