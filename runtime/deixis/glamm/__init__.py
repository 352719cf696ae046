"""The family "glamm": conversations about a picture whose answers hold masks."""
