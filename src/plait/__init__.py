"""plait: decentralized federated fine-tuning with LoRA."""
