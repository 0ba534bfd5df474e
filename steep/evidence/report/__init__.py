"""A finished study as a terminal table and as an HTML page."""
