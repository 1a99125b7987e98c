"""The checkout's shim for the installed `quest-deploy` command: `.venv/bin/python cli.py generate …`."""

from quest_deploy.commands import main

if __name__ == "__main__":
    main()
