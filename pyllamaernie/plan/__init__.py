"""A type for every tensor: errors, probes, the budget's solver, the plan and its report; what fits a machine."""
