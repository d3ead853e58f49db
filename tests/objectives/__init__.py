"""What objectives do in expectation: their gradients, and the laws that they obey."""
