// Live migration of a guest from one QEMU to another, over a Unix socket.
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { Guest } from "./guest.ts";

/** What QEMU says of a migration that has ended. */
export interface MigrationResult {
  /** Milliseconds in all, and of them without the guest running. */
  totalMs: number;
  downtimeMs: number;
  /** How often QEMU went through the dirty pages. */
  passes: number;
  /** Postcopy: pages that the destination had to ask for. */
  requestedPages: number;
}

export interface MigrationOptions {
  /**
   * Lets the guest run on the other side as soon as it can, with its pages
   * still to come.
   */
  postcopy?: boolean;
}

/**
 * Moves the guest to a QEMU that was started with `incoming`; resolves when it
 * runs there. The source is left as it is: to be disposed of.
 *
 * @throws {Error} with QEMU's words when the migration fails
 */
export async function migrate(
  source: Guest,
  destination: Guest,
  { postcopy = false }: MigrationOptions = {},
): Promise<MigrationResult> {
  const folder = mkdtempSync(join(tmpdir(), "vhost2-migration-"));
  try {
    const uri = `unix:${join(folder, "socket")}`;
    await begin(source, destination, uri, postcopy);
    const status = await ended(source);
    const report = await source.qmp("query-migrate") as {
      "error-desc"?: string;
      "total-time"?: number;
      downtime?: number;
      ram?: { "dirty-sync-count"?: number; "postcopy-requests"?: number };
    };
    if (status === "failed") {
      throw source.failure(`The migration failed (${report["error-desc"]})`);
    }
    // Its own event too: it may be a source later.
    await ended(destination);
    await destination.qmpEvent(({ event }) => event === "RESUME");
    return {
      totalMs: report["total-time"] ?? 0,
      downtimeMs: report.downtime ?? 0,
      passes: report.ram?.["dirty-sync-count"] ?? 0,
      requestedPages: report.ram?.["postcopy-requests"] ?? 0,
    };
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

/**
 * Begins a migration by postcopy whose pages come at no more than `bandwidth`
 * bytes a second; resolves when the guest runs on the other side.
 *
 * @param folder where the socket is
 */
export async function beginPostcopy(
  source: Guest,
  destination: Guest,
  folder: string,
  bandwidth: number,
): Promise<void> {
  await source.qmp("migrate-set-parameters", {
    "max-postcopy-bandwidth": bandwidth,
  });
  await begin(source, destination, `unix:${join(folder, "socket")}`, true);
  await destination.qmpEvent(({ event }) => event === "RESUME");
}

async function begin(
  source: Guest,
  destination: Guest,
  uri: string,
  postcopy: boolean,
): Promise<void> {
  const capabilities = [
    { capability: "events", state: true },
    { capability: "postcopy-ram", state: postcopy },
  ];
  for (const guest of [source, destination]) {
    await guest.qmp("migrate-set-capabilities", { capabilities });
  }
  // As fast as it gets: what is measured is that nothing is lost. But before
  // postcopy begins only little is to have come.
  await source.qmp("migrate-set-parameters", {
    "max-bandwidth": postcopy ? 8e6 : 8e9,
  });
  await destination.qmp("migrate-incoming", { uri });
  await source.qmp("migrate", { uri });
  if (!postcopy) return;
  await source.qmpEvent(({ event, data }) =>
    event === "MIGRATION" && data?.status === "active"
  );
  await source.qmp("migrate-start-postcopy");
}

async function ended(guest: Guest): Promise<"completed" | "failed"> {
  const { data } = await guest.qmpEvent(({ event, data }) =>
    event === "MIGRATION" &&
    (data?.status === "completed" || data?.status === "failed")
  );
  return data?.status as "completed" | "failed";
}
