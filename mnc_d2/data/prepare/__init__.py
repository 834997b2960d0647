"""From datasets as they are downloaded to COCO-format annotations; the scripts of ``datasets/`` call these modules."""
