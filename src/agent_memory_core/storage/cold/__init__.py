"""The cold tier: a copy of every session in an object store, for other machines and for the time after this one.

tier       what the rest of the program calls, and the thread that uploads
mirror     a session there and back
book       what the local catalog notes of it
texts      what belongs to a namespace besides its sessions
head       what a session is in the bucket, and how two changes of one come together
names      where things lie there, and how they are sealed
objects    the bucket, with deadlines and compare-and-swap
breaker    what is not asked again for a while
sweep      deleting
"""
