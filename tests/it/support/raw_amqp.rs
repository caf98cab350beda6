//! A producer that writes AMQP by hand, because client libraries refuse to send what the protocol
//! allows.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
};

pub(crate) fn short(text: &[u8]) -> Vec<u8> {
    [&[u8::try_from(text.len()).expect("a short string")], text].concat()
}

pub(crate) fn long(bytes: &[u8]) -> Vec<u8> {
    [&u32::try_from(bytes.len()).expect("a long string").to_be_bytes(), bytes].concat()
}

/// A table with this many tables nested in it, as a value.
pub(crate) fn deep_table(levels: usize) -> Vec<u8> {
    (0..levels).fold(b"V".to_vec(), |value, _| {
        [b"F".to_vec(), long(&[short(b"k"), value].concat())].concat()
    })
}

/// A connection with one channel in confirm mode.
pub(crate) struct Raw(TcpStream);

impl Raw {
    pub(crate) fn connect(url: &str) -> Self {
        let url = url::Url::parse(url).expect("a URL");
        let socket =
            TcpStream::connect((url.host_str().expect("a host"), url.port().unwrap_or(5672)))
                .expect("connects");
        socket.set_read_timeout(Some(super::PATIENCE)).expect("a limit");
        let vhost = match url.path().trim_start_matches('/') {
            "" | "%2f" | "%2F" => "/".to_owned(),
            other => other.to_owned(),
        };
        let login = format!("\0{}\0{}", url.username(), url.password().unwrap_or_default());
        let mut raw = Self(socket);
        raw.0.write_all(b"AMQP\0\0\x09\x01").expect("writes");
        raw.expect(10, 10);
        raw.method(
            0,
            10,
            11,
            &[long(b""), short(b"PLAIN"), long(login.as_bytes()), short(b"en_US")].concat(),
        );
        raw.expect(10, 30);
        raw.method(0, 10, 31, &[0, 9, 0, 2, 0, 0, 0, 0]); // 9 channels, frames of 128 KiB, no heartbeat
        raw.method(0, 10, 40, &[short(vhost.as_bytes()), vec![0, 0]].concat());
        raw.expect(10, 41);
        raw.method(1, 20, 10, &short(b""));
        raw.expect(20, 11);
        raw.method(1, 85, 10, &[0]);
        raw.expect(85, 11);
        raw
    }

    /// Publishes one message and waits for its confirm; `properties` are its flags and what they
    /// announce.
    pub(crate) fn publish(
        &mut self,
        exchange: &[u8],
        routing_key: &[u8],
        properties: &[u8],
        body: &[u8],
    ) {
        self.method(
            1,
            60,
            40,
            &[vec![0, 0], short(exchange), short(routing_key), vec![0]].concat(),
        );
        let size = u64::try_from(body.len()).expect("a size").to_be_bytes();
        self.frame(2, 1, &[&[0, 60, 0, 0][..], &size, properties].concat());
        self.frame(3, 1, body);
        self.expect(60, 80);
    }

    fn method(&mut self, channel: u16, class: u16, method: u16, arguments: &[u8]) {
        self.frame(1, channel, &[&class.to_be_bytes(), &method.to_be_bytes(), arguments].concat());
    }

    fn frame(&mut self, kind: u8, channel: u16, payload: &[u8]) {
        let frame = [&[kind][..], &channel.to_be_bytes(), &long(payload), &[0xce]].concat();
        self.0.write_all(&frame).expect("writes");
    }

    fn expect(&mut self, class: u16, method: u16) {
        let mut head = [0; 7];
        self.0.read_exact(&mut head).expect("a frame");
        let size = u32::from_be_bytes([head[3], head[4], head[5], head[6]]);
        let mut payload = vec![0; size as usize + 1];
        self.0.read_exact(&mut payload).expect("its payload");
        let wanted = [class.to_be_bytes(), method.to_be_bytes()].concat();
        assert!(
            payload.starts_with(&wanted),
            "wanted {wanted:?}, found {:?}: {}",
            &payload[..4],
            String::from_utf8_lossy(&payload[4..])
        );
    }
}
