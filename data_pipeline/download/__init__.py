"""Lists of URLs to shards: ``lists`` reads them, ``fetch`` gets the files, ``run`` writes the shards."""
