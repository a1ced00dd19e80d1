"""The fidelity check: is the deployed network as robust as the trained one, and can that be shown?"""
