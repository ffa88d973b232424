"""Cases of the tests on several processes."""
