import { CryptoOpcode, type CryptoSession } from "../../mod.ts";

/** A symmetric cipher's, with a key that is not all zeros. */
export const session: CryptoSession = {
  kind: "symmetric",
  opcode: CryptoOpcode.CIPHER_CREATE_SESSION,
  sessionId: 0n,
  symmetric: {
    cipherAlgorithm: 3,
    hashAlgorithm: 0,
    digestSize: 0,
    aadSize: 0,
    opType: 1,
    direction: 1,
    hashMode: 0,
    chainOrder: 0,
    cipherKey: Uint8Array.from({ length: 16 }, (_, i) => i),
    authKey: new Uint8Array(0),
  },
};
