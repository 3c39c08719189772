"""Emulators of Google's and of Azure's buckets, which ``make other-stores`` installs; both on loopback."""

from __future__ import annotations

from tests.servers.daemons import Server, free_ports, listening

# Azurite's own, which everybody knows.
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


class GoogleBuckets(Server):
    """A storage server that gcsfs takes for Google's. ``env`` makes it do so."""

    PROGRAM, SCHEME = "gcp-storage-emulator", "gs"

    def __init__(self) -> None:
        super().__init__("rsb-gs-")
        (self._port,) = free_ports(1)
        self.env = {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{self._port}"}

    def start(self) -> None:
        """Start it."""
        self.spawn("gs", self.PROGRAM, "start", "--host=127.0.0.1", f"--port={self._port}", "--in-memory")
        self.wait_daemon("gs", lambda: listening(self._port))


class AzureContainers(Server):
    """Azurite, with its one account. ``env`` makes adlfs use it."""

    PROGRAM, SCHEME = "azurite-blob", "az"

    def __init__(self) -> None:
        super().__init__("rsb-az-")
        (self._port,) = free_ports(1)
        blobs = f"http://127.0.0.1:{self._port}/{ACCOUNT}"
        account = f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint={blobs};"
        self.env = {"AZURE_STORAGE_CONNECTION_STRING": account}

    def start(self) -> None:
        """Start it."""
        options = ("--skipApiVersionCheck", "--disableTelemetry", "--location", str(self.root))
        self.spawn("az", self.PROGRAM, "--blobHost", "127.0.0.1", "--blobPort", str(self._port), *options)
        self.wait_daemon("az", lambda: listening(self._port))
