"""Supervised fine-tuning, prediction and LoRA."""
