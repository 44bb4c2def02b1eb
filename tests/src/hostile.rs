//! Calls that mean harm: bytes that no encoder made, and messages that follow the schema with any values.
//!
//! Everything comes from a seeded generator, so that a failure can be replayed.

use std::collections::BTreeMap;

use consort_proto::v1;
use http_body_util::BodyExt;
use prost::Message;
use prost_types::{
    DescriptorProto, FieldDescriptorProto, FileDescriptorSet,
    field_descriptor_proto::{Label, Type},
};
use rand::{Rng, RngCore, seq::IndexedRandom};
use rand_chacha::ChaCha8Rng;
use tonic::{
    Status,
    body::Body,
    codegen::{Bytes, http},
    transport::Channel,
};
use tower::{Service, ServiceExt};

use crate::raw::soon;

/// Bytes before each message of a call: a flag and the length.
pub const PREFIX_BYTES: usize = 5;
/// Pieces that a body is sent in at most.
const PIECES_MAX: usize = 4;

/// What came of a call.
#[derive(Debug)]
pub struct Answer {
    /// Pieces of messages that came.
    pub data: usize,
    /// How it ended; none where it was not waited for, or the call was broken off.
    pub status: Option<Status>,
}

/// Makes a call with `body` as it is, cut into pieces at random. With `breaks_off`, the call is reset where
/// its body would end. An answer of more than `data_max` pieces is left unread.
pub async fn call(
    channel: &Channel,
    path: &str,
    body: &[u8],
    breaks_off: bool,
    data_max: usize,
    random: &mut ChaCha8Rng,
) -> Answer {
    let (mut sender, outbound) = http_body_util::channel::Channel::new(PIECES_MAX);
    let piece_bytes = body.len().div_ceil(random.random_range(1..=PIECES_MAX)).max(1);
    for piece in body.chunks(piece_bytes) {
        sender.send_data(Bytes::copy_from_slice(piece)).await.expect("there is room");
    }
    if breaks_off {
        sender.abort(Status::cancelled("broken off"));
    } else {
        drop(sender);
    }
    let request = http::Request::post(format!("https://localhost{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Body::new(outbound))
        .expect("a request can be built");
    let read = async {
        let mut channel = channel.clone();
        let response = channel.ready().await?.call(request).await?;
        let mut answer = Answer { data: 0, status: Status::from_header_map(response.headers()) };
        let mut body = response.into_body();
        while answer.status.is_none() && answer.data <= data_max {
            match body.frame().await {
                Some(Ok(frame)) => {
                    answer.data += usize::from(frame.is_data());
                    answer.status = frame.trailers_ref().and_then(Status::from_header_map);
                }
                Some(Err(status)) => answer.status = Some(status),
                None => break,
            }
        }
        Ok::<_, tonic::transport::Error>(answer)
    };
    match soon(path, read).await {
        Ok(answer) => answer,
        Err(error) => Answer { data: 0, status: Some(Status::from_error(Box::new(error))) },
    }
}

/// A message as a call carries it.
pub fn framed(message: &[u8]) -> Vec<u8> {
    let length = u32::try_from(message.len()).expect("a message is short");
    [&[0], length.to_be_bytes().as_slice(), message].concat()
}

/// Numbers at which something may go wrong, and any other.
fn number(random: &mut ChaCha8Rng) -> u64 {
    const ODD: [u64; 12] = [
        0,
        1,
        2,
        16,
        17,
        1 << 23,
        u32::MAX as u64 - 1,
        u32::MAX as u64,
        1 << 32,
        i64::MAX as u64,
        u64::MAX - 1,
        u64::MAX,
    ];
    match random.random_range(0..3) {
        0 => random.random_range(0..64),
        1 => random.random(),
        _ => *ODD.choose(random).expect("there are some"),
    }
}

/// Random bytes, fewer than `length_max`.
pub fn noise(random: &mut ChaCha8Rng, length_max: usize) -> Vec<u8> {
    let mut bytes = vec![0; random.random_range(0..length_max)];
    random.fill_bytes(&mut bytes);
    bytes
}

/// Damages a call's body of these messages in one of the ways that there are.
pub fn damaged(messages: &[Vec<u8>], random: &mut ChaCha8Rng) -> Vec<u8> {
    let mut messages = messages.to_vec();
    let [which, other] = [(); 2].map(|()| random.random_range(0..messages.len()));
    match random.random_range(0..10) {
        0 => return noise(random, 4096),
        1 => messages[which] = noise(random, 4096),
        2 => messages.insert(which, messages[other].clone()),
        3 => messages.swap(which, other),
        4 => drop(messages.remove(which)),
        5 => {
            // A field of any number whose announced length is not what follows.
            let mut field = Vec::new();
            let key = random.random_range(1..20) << 3 | random.random_range(0..8);
            prost::encoding::encode_varint(key, &mut field);
            prost::encoding::encode_varint(number(random), &mut field);
            let at = random.random_range(0..=messages[which].len().min(80));
            messages[which].splice(at..at, field);
        }
        6 => flip_bits(&mut messages[which], random),
        _ => {}
    }
    let mut body: Vec<u8> = messages.iter().flat_map(|message| framed(message)).collect();
    let prefix: usize = messages.iter().take(which).map(|message| message.len() + PREFIX_BYTES).sum();
    match random.random_range(0..6) {
        0 => body.truncate(random.random_range(0..=body.len())),
        1 if prefix < body.len() => body[prefix] = random.random(),
        2 if prefix < body.len() => {
            let length = (number(random) as u32).to_be_bytes();
            body[prefix + 1..prefix + PREFIX_BYTES].copy_from_slice(&length);
        }
        3 => flip_bits(&mut body, random),
        4 => body.extend(noise(random, 64)),
        _ => {}
    }
    body
}

/// Flips some bits, half of the time in the first ones, where the fields are.
fn flip_bits(bytes: &mut [u8], random: &mut ChaCha8Rng) {
    let range = if random.random() { bytes.len().min(48) } else { bytes.len() };
    if range > 0 {
        for _ in 0..random.random_range(1..6) {
            bytes[random.random_range(0..range)] ^= 1 << random.random_range(0..8);
        }
    }
}

/// The protocol's messages and calls, from its own descriptors.
pub struct Schema {
    messages: BTreeMap<String, DescriptorProto>,
    /// Path and the name of the request's message, of every call.
    pub calls: Vec<(String, String)>,
}

impl Schema {
    /// That of `consort.v1`.
    pub fn new() -> Self {
        let files = FileDescriptorSet::decode(v1::DESCRIPTORS).expect("descriptors can be decoded").file;
        let (mut messages, mut calls) = (BTreeMap::new(), Vec::new());
        for file in files {
            for message in &file.message_type {
                messages.insert(format!(".{}.{}", file.package(), message.name()), message.clone());
            }
            for service in &file.service {
                for method in &service.method {
                    let path = format!("/{}.{}/{}", file.package(), service.name(), method.name());
                    calls.push((path, method.input_type().to_owned()));
                }
            }
        }
        Self { messages, calls }
    }

    /// A message of that name with any values; bytes and texts often are of `words`.
    pub fn message(&self, name: &str, words: &[Vec<u8>], random: &mut ChaCha8Rng) -> Vec<u8> {
        let mut message = Vec::new();
        for field in &self.messages[name].field {
            let copies = match field.label() {
                Label::Repeated => random.random_range(0..5),
                _ => usize::from(random.random_ratio(9, 10)),
            };
            for _ in 0..copies {
                self.field(field, words, random, &mut message);
            }
        }
        message
    }

    fn field(
        &self,
        field: &FieldDescriptorProto,
        words: &[Vec<u8>],
        random: &mut ChaCha8Rng,
        message: &mut Vec<u8>,
    ) {
        let mut key = |wire_type| {
            prost::encoding::encode_varint((field.number() as u64) << 3 | wire_type, message);
        };
        let content = match field.r#type() {
            Type::Double => {
                key(1);
                let odd = [f64::NAN, f64::INFINITY, -1.0, f64::MAX, f64::from_bits(random.random())];
                message.extend(odd.choose(random).expect("there are some").to_le_bytes());
                return;
            }
            Type::Message => self.message(field.type_name(), words, random),
            Type::Bytes | Type::String => match random.random_range(0..4) {
                0 => noise(random, 300),
                1 => vec![b'x'; *[0, 15, 16, 31, 32, 33, 5000].choose(random).expect("there are some")],
                _ => words.choose(random).expect("there are words").clone(),
            },
            _ => {
                key(0);
                prost::encoding::encode_varint(number(random), message);
                return;
            }
        };
        key(2);
        prost::encoding::encode_varint(content.len() as u64, message);
        message.extend(content);
    }
}

impl Default for Schema {
    fn default() -> Self {
        Self::new()
    }
}
