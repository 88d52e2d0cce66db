"""What every algorithm, memory and task family is built from. Nothing here imports them."""
