"""What `osft doctor` checks, an area a file: a cluster, its services, this machine; each finding with its remedy.

A check is a function of a `Subject` that yields findings. It changes nothing, but for two probes that it removes again
(an object in an object store, a folder on a mounted volume) and, only with `--pull-images`, pods that pull an image.
"""
