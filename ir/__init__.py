"""The graph, semantic operators, patterns, rules, and the driver that applies and checks them."""
