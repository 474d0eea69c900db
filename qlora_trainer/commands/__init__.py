"""What the subcommands of `qlora` do: a short function each, which puts rooms together and prints what they say."""
