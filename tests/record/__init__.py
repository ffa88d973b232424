"""The recorder: loops of our own, TRL's trainers, wrong records."""
