"""The formats that networks are exported to, a folder for each."""
