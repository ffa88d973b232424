"""What may be asked of an explained step, against what it is by definition."""
