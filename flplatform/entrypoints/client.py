"""`fl_client KIT`: a site's parent process."""

import sys

from flplatform.client.client import SiteClient
from flplatform.entrypoints.process import run
from flplatform.files.durable import end_on_failed_sync


def main() -> None:
    """Run the site whose kit is named on the command line."""
    end_on_failed_sync()
    sys.exit(run(SiteClient, "site"))


if __name__ == "__main__":
    main()
