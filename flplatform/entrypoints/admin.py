"""`fl_admin KIT`: the console."""

from flplatform.admin.console.main import app


def main() -> None:
    """Run the console whose kit is named on the command line."""
    app(prog_name="fl_admin")


if __name__ == "__main__":
    main()
