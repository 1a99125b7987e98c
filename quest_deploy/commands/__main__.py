"""`python -m quest_deploy.commands`: the command without its installed script."""

from quest_deploy.commands import main

if __name__ == "__main__":
    main(prog_name="quest-deploy")
