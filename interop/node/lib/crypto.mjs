// The three functions that the protocol is made of ("Words and notation"), over blakejs and tweetnacl.

import { randomBytes, timingSafeEqual } from 'node:crypto';
import { blake2b } from 'blakejs';
import nacl from 'tweetnacl';

export { randomBytes };

/** B(n, key, label, x) of the text; `key` may be null for none. */
export function B(size, key, label, ...x) {
  const person = Buffer.alloc(16);
  person.write(label, 'ascii');
  return Buffer.from(blake2b(Buffer.concat(x), key ?? undefined, size, undefined, person));
}

/** X25519 of a secret and a public key; all zeros where the key is a bad one. */
export function x25519(secret, publicKey) {
  return Buffer.from(nacl.scalarMult(secret, publicKey));
}

export function publicKeyOf(secret) {
  return Buffer.from(nacl.scalarMult.base(secret));
}

/** secretbox(k, n, x): the authenticator, then the ciphertext. */
export function seal(key, nonce, plaintext) {
  return Buffer.from(nacl.secretbox(plaintext, nonce, key));
}

/** What was sealed, or null where the box does not open. */
export function unseal(key, nonce, box) {
  const plaintext = nacl.secretbox.open(box, nonce, key);
  return plaintext && Buffer.from(plaintext);
}

/** Whether both are the same, in a time that tells nothing. */
export function sameSecret(a, b) {
  return a.length === b.length && timingSafeEqual(a, b);
}
