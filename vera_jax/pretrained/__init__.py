"""What joins models and adapters: pretrained bases with adapters on them."""
