"""What may be asked: quantization, adapter, training; specs of models; code that pastes back."""
