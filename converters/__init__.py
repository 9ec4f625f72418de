"""One file per operator family: how each operator lives in time. Shipped as ``dissect.converters``.

Every module here is imported when the first converter is looked up, so a new family is a new file and
touches no other.
"""
