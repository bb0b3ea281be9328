"""Rows of chats, answers and preference pairs to fine-tune on: read, tokenized, masked, packed; no framework."""
