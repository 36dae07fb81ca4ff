"""Other libraries' checkpoint interfaces on this engine: one file a library, imported only when it is used."""
