/**
 * The crypto session of CREATE_CRYPTO_SESSION. The specification gives it no
 * picture; this is QEMU's VhostUserCryptoSession and DPDK's
 * VhostUserCryptoSessionParam, 1072 bytes:
 *
 *   0     op_code (u32 in DPDK, u64 in QEMU; the upper half is zero)
 *   8     union, 1056 bytes: symmetric parameters, or asymmetric ones
 *   1064  i64 session_id: reply, negative for failure
 *
 * (QEMU before 8.1 and DPDK before 25.03 sent 632 bytes in two layouts that
 * no field tells apart; such a payload is refused by its size.)
 */

import { type Codec, struct, u32, u8, viewOf, wrongSize } from "./layout.ts";

/** Bytes; bounds of the key buffers. */
export const MAX_CIPHER_KEY_SIZE = 64;
export const MAX_AUTH_KEY_SIZE = 512;
export const MAX_ASYMMETRIC_KEY_SIZE = 1024;

/** VIRTIO_CRYPTO_*_CREATE_SESSION: service << 8 | 2 or, for akcipher, 4. */
export const CryptoOpcode = {
  CIPHER_CREATE_SESSION: 0x002,
  HASH_CREATE_SESSION: 0x102,
  MAC_CREATE_SESSION: 0x202,
  AEAD_CREATE_SESSION: 0x302,
  AKCIPHER_CREATE_SESSION: 0x404,
} as const;

/** CryptoDevBackendSymSessionInfo without its lengths and pointers. */
export interface SymmetricSession {
  readonly cipherAlgorithm: number;
  readonly hashAlgorithm: number;
  /** Bytes. */
  readonly digestSize: number;
  /** Bytes of additional authenticated data. */
  readonly aadSize: number;
  readonly opType: number;
  readonly direction: number;
  readonly hashMode: number;
  readonly chainOrder: number;
  readonly cipherKey: Uint8Array;
  readonly authKey: Uint8Array;
}

/** CryptoDevBackendAsymSessionInfo without its length and pointer. */
export interface AsymmetricSession {
  readonly algorithm: number;
  readonly keyType: number;
  /** RSA. */
  readonly paddingAlgorithm: number;
  /** RSA. */
  readonly hashAlgorithm: number;
  readonly key: Uint8Array;
}

/** Which half of the union holds is told by the opcode. */
export type CryptoSession =
  & {
    readonly opcode: number;
    /** 0 in a request; the reply's session, negative for failure. */
    readonly sessionId: bigint;
  }
  & (
    | { readonly kind: "symmetric"; readonly symmetric: SymmetricSession }
    | { readonly kind: "asymmetric"; readonly asymmetric: AsymmetricSession }
  );

const UNION_OFFSET = 8;
const SESSION_ID_OFFSET = 1064;
const SESSION_SIZE = 1072;

/** The first 28 bytes of the symmetric half; 4 bytes pad, 2 pointers follow. */
const symmetricHead = struct<{
  cipherAlgorithm: number;
  cipherKeySize: number;
  hashAlgorithm: number;
  digestSize: number;
  authKeySize: number;
  aadSize: number;
  opType: number;
  direction: number;
  hashMode: number;
  chainOrder: number;
}>("symmetric session", 28, {
  cipherAlgorithm: u32("cipher_alg"),
  cipherKeySize: u32("key_len"),
  hashAlgorithm: u32("hash_alg"),
  digestSize: u32("hash_result_len"),
  authKeySize: u32("auth_key_len"),
  aadSize: u32("add_len"),
  opType: u8("op_type"),
  direction: u8("direction"),
  hashMode: u8("hash_mode"),
  chainOrder: u8("alg_chain_order"),
});
const CIPHER_KEY_OFFSET = UNION_OFFSET + 48;
const AUTH_KEY_OFFSET = CIPHER_KEY_OFFSET + MAX_CIPHER_KEY_SIZE;

/** The first 12 bytes of the asymmetric half; pad and a pointer follow. */
const asymmetricHead = struct<{
  algorithm: number;
  keyType: number;
  keySize: number;
}>("asymmetric session", 12, {
  algorithm: u32("algo"),
  keyType: u32("keytype"),
  keySize: u32("keylen"),
});
const RSA_OFFSET = UNION_OFFSET + 24;
const rsaOptions = struct<{ paddingAlgorithm: number; hashAlgorithm: number }>(
  "rsa",
  8,
  { paddingAlgorithm: u32("padding_algo"), hashAlgorithm: u32("hash_algo") },
);
const ASYMMETRIC_KEY_OFFSET = UNION_OFFSET + 32;

function tooLong(what: string, size: number, limit: number) {
  return `crypto session ${what} has ${size} bytes, limit is ${limit}`;
}

function requireFits(what: string, key: Uint8Array, limit: number): void {
  if (key.byteLength > limit) {
    throw new RangeError(
      `Cannot encode ${tooLong(what, key.byteLength, limit)}`,
    );
  }
}

export const cryptoSession: Codec<CryptoSession> = {
  name: "crypto session",
  minSize: SESSION_SIZE,
  maxSize: SESSION_SIZE,
  decode(bytes) {
    if (bytes.byteLength !== SESSION_SIZE) {
      return wrongSize("crypto session", bytes.byteLength, SESSION_SIZE);
    }
    const view = viewOf(bytes);
    const opcode = view.getUint32(0, true);
    const sessionId = view.getBigInt64(SESSION_ID_OFFSET, true);
    if (opcode === CryptoOpcode.AKCIPHER_CREATE_SESSION) {
      const { keySize, ...head } = asymmetricHead.read(view, UNION_OFFSET);
      if (keySize > MAX_ASYMMETRIC_KEY_SIZE) {
        return {
          ok: false,
          reason: tooLong("key", keySize, MAX_ASYMMETRIC_KEY_SIZE),
        };
      }
      const key = bytes.slice(
        ASYMMETRIC_KEY_OFFSET,
        ASYMMETRIC_KEY_OFFSET + keySize,
      );
      const asymmetric = { ...head, ...rsaOptions.read(view, RSA_OFFSET), key };
      return {
        ok: true,
        value: { kind: "asymmetric", opcode, sessionId, asymmetric },
      };
    }
    const { cipherKeySize, authKeySize, ...head } = symmetricHead.read(
      view,
      UNION_OFFSET,
    );
    if (cipherKeySize > MAX_CIPHER_KEY_SIZE) {
      return {
        ok: false,
        reason: tooLong("cipher key", cipherKeySize, MAX_CIPHER_KEY_SIZE),
      };
    }
    if (authKeySize > MAX_AUTH_KEY_SIZE) {
      return {
        ok: false,
        reason: tooLong("auth key", authKeySize, MAX_AUTH_KEY_SIZE),
      };
    }
    const symmetric = {
      ...head,
      cipherKey: bytes.slice(
        CIPHER_KEY_OFFSET,
        CIPHER_KEY_OFFSET + cipherKeySize,
      ),
      authKey: bytes.slice(AUTH_KEY_OFFSET, AUTH_KEY_OFFSET + authKeySize),
    };
    return {
      ok: true,
      value: { kind: "symmetric", opcode, sessionId, symmetric },
    };
  },
  encode(session) {
    const bytes = new Uint8Array(SESSION_SIZE);
    const view = viewOf(bytes);
    view.setUint32(0, session.opcode, true);
    view.setBigInt64(SESSION_ID_OFFSET, session.sessionId, true);
    if (session.kind === "asymmetric") {
      const { key, ...head } = session.asymmetric;
      requireFits("key", key, MAX_ASYMMETRIC_KEY_SIZE);
      asymmetricHead.write(view, UNION_OFFSET, {
        ...head,
        keySize: key.byteLength,
      });
      rsaOptions.write(view, RSA_OFFSET, head);
      bytes.set(key, ASYMMETRIC_KEY_OFFSET);
    } else {
      const { cipherKey, authKey, ...head } = session.symmetric;
      requireFits("cipher key", cipherKey, MAX_CIPHER_KEY_SIZE);
      requireFits("auth key", authKey, MAX_AUTH_KEY_SIZE);
      symmetricHead.write(view, UNION_OFFSET, {
        ...head,
        cipherKeySize: cipherKey.byteLength,
        authKeySize: authKey.byteLength,
      });
      bytes.set(cipherKey, CIPHER_KEY_OFFSET);
      bytes.set(authKey, AUTH_KEY_OFFSET);
    }
    return bytes;
  },
  /** Keys are secrets: their lengths only. */
  describe(session) {
    const head = `op_code=0x${session.opcode.toString(16)} ` +
      `session_id=${session.sessionId}`;
    return session.kind === "asymmetric"
      ? `${head} algo=${session.asymmetric.algorithm} ` +
        `keylen=${session.asymmetric.key.byteLength}`
      : `${head} cipher_alg=${session.symmetric.cipherAlgorithm} ` +
        `key_len=${session.symmetric.cipherKey.byteLength} ` +
        `auth_key_len=${session.symmetric.authKey.byteLength}`;
  },
};
