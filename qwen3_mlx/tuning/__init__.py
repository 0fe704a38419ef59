"""Fine-tuning: lessons, training steps, adapters."""
