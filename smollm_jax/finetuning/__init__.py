"""Fine-tuning: what differs from pre-training in what is read, what is learnt and what is written."""
