"""Whether a method helps: compare, its statistics, its store of runs, its report."""
