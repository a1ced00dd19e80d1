"""Networks: as torch modules, as typed layer graphs, and as float spiking networks."""
