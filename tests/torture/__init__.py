"""Whatever happens to a process or its disk: nothing wrong is read, nothing is lost, nothing lies about."""
