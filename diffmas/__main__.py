from diffmas.cli import app

app(prog_name="diffmas")
