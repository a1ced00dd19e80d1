"""Networks from other software: NIR files as float SNNs of our own, with what NIR leaves open said by the user."""
