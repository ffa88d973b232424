"""Plans, workspaces, runners, results and the commands around them."""
