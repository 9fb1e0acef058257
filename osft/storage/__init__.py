"""Places that things are read from and written to: paths, and the URIs of an object store.

A plain path is used in place; every function here then does nothing or the obvious. A URI (`s3://bucket/prefix`, or
another protocol that fsspec knows) has a local copy: a path below the scratch folder (OSFT_SCRATCH, or a folder in
the user's temporary directory) that is determined by the endpoint and the URI. Code reads and writes the copy, and
says when something is fetched and published. The copy may be lost at any time.

The credentials and the endpoint of S3 come from the environment only (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
AWS_ENDPOINT_URL, AWS_REGION; on a cluster from a secret); a URI that holds credentials is refused.

What lies below a storage root or an output folder, whichever it is, path or URI (`osft.rounds` has the folders):

    thing                          written by                          complete when it has (its marker)
    examples/<name>                resolve_round, prepare_data         config.json; a file: when it is there
    records/<hash>.jsonl           resolve_round                       when it is there
    models/<name>                  prepare_data                        config.json
    data/<hash>/                   prepare_data, osft()                dataset.json
    factors/weights/<key>          precompute_svd, osft()              a file: when it is there
    factors/sets/<key>.json        precompute_svd, osft()              when it is there; its weights came before
    factors/moments/<hash>         precompute_svd, osft(), rank 0      a file: when it is there
    factors/statistics/<key>.json  precompute_svd, osft(), rank 0      when it is there; its moments came before
    scores/<key>.json              evaluate_model                      when it is there and its hash is right
    champions/<model>/<n>.json     promote_model                       when it is there; created once, never changed
    <run>/config.json              node 0, at the start                when it is there
    <run>/hf_format/samples_<n>.0/ rank 0                              config.json
    <run>/state/step-<n>/          every rank its own files            position.json, by rank 0 after all the others;
                                                                       removed when the run is complete
    <run>/metrics.jsonl            rank 0, every 10 s and at a save    growing; replaced as a whole
    <run>/stop                     whoever follows the run             when it is there; removed by the next start
    <run>/training.json            rank 0                              when it is there: then the run is complete

A folder's marker is uploaded after everything else in it, and nothing without its marker is read as complete. A folder
that is complete is not written again. Requests are repeated when the store answers with an error of its own (5xx,
"slow down"), breaks off or does not answer; what still fails then is raised, and says what to do.
"""

from osft.storage.locations import (
    Entry,
    create,
    fetch,
    fetch_files,
    files,
    find,
    is_remote,
    join,
    local,
    name_of,
    names,
    publish,
    read,
    remove,
    remove_files,
    sizes,
    write,
)

__all__ = [
    "Entry",
    "create",
    "fetch",
    "fetch_files",
    "files",
    "find",
    "is_remote",
    "join",
    "local",
    "name_of",
    "names",
    "publish",
    "read",
    "remove",
    "remove_files",
    "sizes",
    "write",
]
