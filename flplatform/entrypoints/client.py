"""`fl_client KIT`: a site's parent process."""

import sys

from flplatform.client.client import SiteClient
from flplatform.entrypoints.process import run


def main() -> None:
    """Run the site whose kit is named on the command line."""
    sys.exit(run(SiteClient, "site"))


if __name__ == "__main__":
    main()
