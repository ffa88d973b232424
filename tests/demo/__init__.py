"""The demo: its policy, its steps, and what it must show."""
