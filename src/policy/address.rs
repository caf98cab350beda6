//! The addresses that a request may go to.
//!
//! A subscriber's URL is often a stranger's input: without this, a receiver's owner could have the
//! daemon talk to the machine it runs on, to its network, or to a cloud's metadata service.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use url::{Host, Url};

/// The decision for one subscriber, from `[http]`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AddressPolicy {
    /// Requests may go to every address.
    pub allow_private: bool,
    /// Exceptions: networks that requests may go to although they are not public.
    pub allow: Vec<IpNet>,
}

const fn v4(a: u8, b: u8, c: u8, d: u8, prefix: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), prefix)
}

const fn v6(a: u16, b: u16, c: u16, d: u16, h: u16, prefix: u8) -> Ipv6Net {
    Ipv6Net::new_assert(Ipv6Addr::new(a, b, c, d, 0, 0, 0, h), prefix)
}

/// Not globally reachable by the IANA IPv4 Special-Purpose Address Registry (RFC 6890), and more.
const BLOCKED_V4: &[(Ipv4Net, &str)] = &[
    (v4(0, 0, 0, 0, 8), "this network"),
    (v4(10, 0, 0, 0, 8), "private"),
    (v4(100, 64, 0, 0, 10), "carrier NAT"),
    (v4(127, 0, 0, 0, 8), "loopback"),
    (v4(168, 63, 129, 16, 32), "cloud metadata"), // Azure's, at a public address
    (v4(169, 254, 0, 0, 16), "link-local"),       // the metadata address of most clouds is here
    (v4(172, 16, 0, 0, 12), "private"),
    (v4(192, 0, 0, 0, 24), "protocol assignments"),
    (v4(192, 0, 2, 0, 24), "documentation"),
    (v4(192, 88, 99, 0, 24), "6to4 relay"),
    (v4(192, 168, 0, 0, 16), "private"),
    (v4(198, 18, 0, 0, 15), "benchmarking"),
    (v4(198, 51, 100, 0, 24), "documentation"),
    (v4(203, 0, 113, 0, 24), "documentation"),
    (v4(224, 0, 0, 0, 4), "multicast"),
    (v4(240, 0, 0, 0, 4), "reserved"),
];

/// Everything that is assigned as global unicast (IANA, Internet Protocol Version 6 Address Space).
/// Other addresses lead nowhere or into a private network, except those that carry a public IPv4
/// address.
const GLOBAL_V6: Ipv6Net = v6(0x2000, 0, 0, 0, 0, 3);

/// The same for IPv6. Addresses that carry an IPv4 address are judged by that one first.
const BLOCKED_V6: &[(Ipv6Net, &str)] = &[
    (v6(0, 0, 0, 0, 0, 128), "unspecified"),
    (v6(0, 0, 0, 0, 1, 128), "loopback"),
    (v6(0, 0, 0, 0, 0, 96), "IPv4-compatible"), // deprecated by RFC 4291, section 2.5.5.1
    (v6(0x64, 0xff9b, 1, 0, 0, 48), "local NAT64"),
    (v6(0x100, 0, 0, 0, 0, 64), "discard"),
    (v6(0x2001, 0, 0, 0, 0, 23), "protocol assignments"), // Teredo among them
    (v6(0x2001, 0xdb8, 0, 0, 0, 32), "documentation"),
    (v6(0x3fff, 0, 0, 0, 0, 20), "documentation"),
    (v6(0x5f00, 0, 0, 0, 0, 16), "segment routing"),
    (v6(0xfc00, 0, 0, 0, 0, 7), "unique local"),
    (v6(0xfe80, 0, 0, 0, 0, 10), "link-local"),
    (v6(0xfec0, 0, 0, 0, 0, 10), "site-local"),
    (v6(0xff00, 0, 0, 0, 0, 8), "multicast"),
];

/// The IPv4 address that `ip` carries, to which its packets go.
fn embedded_v4(ip: Ipv6Addr) -> Option<Ipv4Addr> {
    let s = ip.segments();
    let of = |hi: u16, lo: u16| Ipv4Addr::from((u32::from(hi) << 16) | u32::from(lo));
    match s {
        [0, 0, 0, 0, 0, 0xffff, hi, lo] => Some(of(hi, lo)), // mapped
        [0, 0, 0, 0, 0xffff, 0, hi, lo] => Some(of(hi, lo)), // translated, RFC 2765
        [0x64, 0xff9b, 0, 0, 0, 0, hi, lo] => Some(of(hi, lo)), // NAT64, RFC 6052
        [0x2002, hi, lo, ..] => Some(of(hi, lo)),            // 6to4, RFC 3056
        _ => None,
    }
}

/// The kind of non-public address that `ip` is; `None` if it is public.
pub fn not_public(ip: IpAddr) -> Option<&'static str> {
    match ip {
        IpAddr::V4(ip) => {
            BLOCKED_V4.iter().find(|(net, _)| net.contains(&ip)).map(|(_, what)| *what)
        }
        IpAddr::V6(ip) => match embedded_v4(ip) {
            Some(v4) => not_public(IpAddr::V4(v4)),
            None => {
                let special =
                    BLOCKED_V6.iter().find(|(net, _)| net.contains(&ip)).map(|(_, what)| *what);
                special.or_else(|| (!GLOBAL_V6.contains(&ip)).then_some("not global unicast"))
            }
        },
    }
}

impl AddressPolicy {
    /// Whether a request may go to `ip`.
    ///
    /// # Errors
    /// The kind of address that it is.
    pub fn check(&self, ip: IpAddr) -> Result<(), &'static str> {
        let Some(what) = not_public(ip) else { return Ok(()) };
        let embedded = match ip {
            IpAddr::V6(v6) => embedded_v4(v6).map(IpAddr::V4),
            IpAddr::V4(_) => None,
        };
        let named = |net: &IpNet| net.contains(&ip) || embedded.is_some_and(|v4| net.contains(&v4));
        if self.allow_private || self.allow.iter().any(named) { Ok(()) } else { Err(what) }
    }

    /// Whether a request may go to the literal address of `url`. A name passes: the addresses that it
    /// resolves to are checked before a connection.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub fn check_literal(&self, url: &Url) -> Result<(), &'static str> {
        match url.host() {
            Some(Host::Ipv4(ip)) => self.check(ip.into()),
            Some(Host::Ipv6(ip)) => self.check(ip.into()),
            Some(Host::Domain(_)) | None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The literal address that a URL with this host would be sent to.
    fn literal(host: &str) -> Option<IpAddr> {
        match Url::parse(&format!("http://{host}/")).ok()?.host()? {
            Host::Ipv4(ip) => Some(IpAddr::V4(ip)),
            Host::Ipv6(ip) => Some(IpAddr::V6(ip)),
            Host::Domain(_) => None,
        }
    }

    #[test]
    fn every_spelling_of_a_private_address_is_refused() {
        let spellings = [
            "127.0.0.1",
            "127.1",
            "127.0.1",
            "2130706433",
            "0x7f000001",
            "0x7f.1",
            "0177.0.0.1",
            "017700000001",
            "127.0.0.1.",
            "127.255.255.254",
            "0",
            "0.0.0.0",
            "10.0.0.1",
            "10.255.255.255",
            "167772161",
            "100.64.0.1",
            "100.127.255.255",
            "100.100.100.200",
            "169.254.169.254",
            "0xa9fea9fe",
            "2852039166",
            "168.63.129.16",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.192",
            "192.0.2.1",
            "192.88.99.1",
            "192.168.0.1",
            "198.18.0.1",
            "198.19.255.255",
            "198.51.100.7",
            "203.0.113.9",
            "224.0.0.1",
            "239.255.255.255",
            "240.0.0.1",
            "255.255.255.255",
            "[::]",
            "[::1]",
            "[0:0:0:0:0:0:0:1]",
            "[::ffff:127.0.0.1]",
            "[::ffff:7f00:1]",
            "[::ffff:10.0.0.1]",
            "[::127.0.0.1]",
            "[::5]",
            "[::ffff]",
            "[::1:0]",
            "[::8.8.8.8]",
            "[1::1]",
            "[200::1]",
            "[1fff::1]",
            "[4000::1]",
            "[e000::1]",
            "[0:0:0:1::]",
            "[::ff:0:1]",
            "[64:ff9b:0:1::1]",
            "[::ffff:0:127.0.0.1]",
            "[64:ff9b::127.0.0.1]",
            "[64:ff9b::a9fe:a9fe]",
            "[64:ff9b:1::1]",
            "[2002:7f00:1::]",
            "[2002:c0a8:1::1]",
            "[2001::1]",
            "[2001:db8::1]",
            "[3fff::1]",
            "[5f00::1]",
            "[100::1]",
            "[fc00::1]",
            "[fd00:ec2::254]",
            "[fe80::1]",
            "[fec0::1]",
            "[ff02::1]",
            "%31%32%37.0.0.1",
            "１２７.0.0.1",
        ];
        for host in spellings {
            let ip = literal(host).unwrap_or_else(|| panic!("{host} is not a literal address"));
            assert!(AddressPolicy::default().check(ip).is_err(), "{host} is {ip}");
            assert!(
                AddressPolicy { allow_private: true, allow: vec![] }.check(ip).is_ok(),
                "{host}"
            );
        }
    }

    #[test]
    fn public_addresses_pass_in_every_form() {
        for host in [
            "1.1.1.1",
            "134744072",
            "172.15.0.1",
            "172.32.0.1",
            "100.63.0.1",
            "100.128.0.1",
            "169.253.0.1",
            "[2606:4700::1111]",
            "[::ffff:1.1.1.1]",
            "[64:ff9b::8.8.8.8]",
            "[2002:808:808::]",
        ] {
            let ip = literal(host).expect("a literal address");
            assert_eq!(AddressPolicy::default().check(ip), Ok(()), "{host}");
        }
    }

    #[test]
    fn exceptions_open_their_network_and_no_more() {
        let policy = AddressPolicy {
            allow_private: false,
            allow: vec!["10.1.0.0/16".parse().expect("a network")],
        };
        for (host, ok) in [
            ("10.1.2.3", true),
            ("[::ffff:10.1.2.3]", true),
            ("10.2.0.1", false),
            ("127.0.0.1", false),
        ] {
            assert_eq!(policy.check(literal(host).expect("literal")).is_ok(), ok, "{host}");
        }
    }
}
