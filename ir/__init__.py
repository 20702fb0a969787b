"""The graph, its types and its text."""
