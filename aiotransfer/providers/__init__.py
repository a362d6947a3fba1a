"""Ways to reach peers. Only this folder imports the compiled extension; see `port` for what a provider is."""
