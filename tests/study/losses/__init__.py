"""A step on another loss than the policy gradient: really taken by torch, and predicted from `step.loss` of a plan."""
