// An OHTTP client and gateway on @hpke/core and bhttp-js, following RFC 9458 independently of Cloister.
// One JSON command per line on stdin, one JSON answer per line on stdout; binary values are hexadecimal.
import { createInterface } from "node:readline";
import { Aes256Gcm, CipherSuite, DhkemX25519HkdfSha256, HkdfSha256 } from "@hpke/core";
import { XWing } from "@hpke/hybridkem-x-wing";
import { BHttpDecoder, BHttpEncoder } from "bhttp-js";

const { subtle } = globalThis.crypto;
const KEMS = { 0x0020: DhkemX25519HkdfSha256, 0x647a: XWing };
const PUBLIC_KEY_SIZES = { 0x0020: 32, 0x647a: 1216 };
const text = (s) => new TextEncoder().encode(s);
const hex = (bytes) => Buffer.from(bytes).toString("hex");
const unhex = (s) => new Uint8Array(Buffer.from(s, "hex"));
const join = (...parts) => new Uint8Array(Buffer.concat(parts));
const suiteOf = (kemId) => new CipherSuite({ kem: new KEMS[kemId](), kdf: new HkdfSha256(), aead: new Aes256Gcm() });
const header = (keyId, kemId) => new Uint8Array([keyId, kemId >> 8, kemId & 255, 0, 1, 0, 2]);
const info = (head) => join(text("message/bhttp request"), new Uint8Array(1), head);

async function responseCipher(context, enc, nonce) {
  const secret = await context.export(text("message/bhttp response"), 32);
  const material = await subtle.importKey("raw", secret, "HKDF", false, ["deriveBits"]);
  const derive = (label, bits) =>
    subtle.deriveBits({ name: "HKDF", hash: "SHA-256", salt: join(enc, nonce), info: text(label) }, material, bits);
  const key = await subtle.importKey("raw", await derive("key", 256), "AES-GCM", false, ["encrypt", "decrypt"]);
  return [key, { name: "AES-GCM", iv: await derive("nonce", 96) }];
}

let pending;

const commands = {
  async request({ configuration, method, url, headers, content }) {
    const bytes = unhex(configuration);
    const kemId = (bytes[1] << 8) | bytes[2];
    const suite = suiteOf(kemId);
    const publicKey = bytes.slice(3, 3 + PUBLIC_KEY_SIZES[kemId]);
    const head = header(bytes[0], kemId);
    const recipientPublicKey = await suite.kem.deserializePublicKey(publicKey.buffer);
    const context = await suite.createSenderContext({ recipientPublicKey, info: info(head) });
    const body = method === "GET" ? undefined : unhex(content);
    const plaintext = await new BHttpEncoder().encodeRequest(new Request(url, { method, headers, body }));
    const enc = new Uint8Array(context.enc);
    pending = { context, enc };
    return { message: hex(join(head, enc, new Uint8Array(await context.seal(plaintext)))) };
  },

  async response({ message }) {
    const bytes = unhex(message);
    const [key, parameters] = await responseCipher(pending.context, pending.enc, bytes.slice(0, 32));
    const plaintext = await subtle.decrypt(parameters, key, bytes.slice(32));
    const response = new BHttpDecoder().decodeResponse(new Uint8Array(plaintext));
    const headers = Object.fromEntries(response.headers);
    return { status: response.status, headers, content: hex(new Uint8Array(await response.arrayBuffer())) };
  },

  async serve({ privateKey, publicKey, message, status, headers, content }) {
    const bytes = unhex(message);
    const kemId = (bytes[1] << 8) | bytes[2];
    const suite = suiteOf(kemId);
    const split = 7 + suite.kem.encSize;
    const enc = bytes.slice(7, split);
    const recipientKey = {
      privateKey: await suite.kem.deserializePrivateKey(unhex(privateKey).buffer),
      publicKey: await suite.kem.deserializePublicKey(unhex(publicKey).buffer),
    };
    const context = await suite.createRecipientContext({ recipientKey, enc, info: info(bytes.slice(0, 7)) });
    const request = new BHttpDecoder().decodeRequest(new Uint8Array(await context.open(bytes.slice(split))));
    const nonce = globalThis.crypto.getRandomValues(new Uint8Array(32));
    const [key, parameters] = await responseCipher(context, enc, nonce);
    const plaintext = await new BHttpEncoder().encodeResponse(new Response(unhex(content), { status, headers }));
    const sealed = new Uint8Array(await subtle.encrypt(parameters, key, plaintext));
    return {
      method: request.method,
      url: request.url,
      headers: Object.fromEntries(request.headers),
      content: hex(new Uint8Array(await request.arrayBuffer())),
      response: hex(join(nonce, sealed)),
    };
  },
};

for await (const line of createInterface({ input: process.stdin })) {
  const { command, ...parameters } = JSON.parse(line);
  let answer;
  try {
    answer = await commands[command](parameters);
  } catch (error) {
    answer = { error: `${error.name}: ${error.message}` };
  }
  process.stdout.write(JSON.stringify(answer) + "\n");
}
