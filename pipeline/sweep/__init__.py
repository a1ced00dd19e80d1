"""How robust, how large and how busy the deployed network is over bits of its weights and time steps T."""
