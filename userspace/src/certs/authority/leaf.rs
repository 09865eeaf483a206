//! The one form of leaf certificate that our CA signs, written as DER. By hand, because the issuer's name must be copied
//! byte for byte (libraries that rebuild it lose repeated attributes, such as two DCs, and break the chain).
//! Not here: whether it should be signed (`authority`).

use rand::Rng;
use std::net::IpAddr;

const OID_SUBJECT_KEY_ID: &[u8] = &[0x55, 0x1d, 0x0e];
const OID_KEY_USAGE: &[u8] = &[0x55, 0x1d, 0x0f];
const OID_SUBJECT_ALT_NAME: &[u8] = &[0x55, 0x1d, 0x11];
const OID_BASIC_CONSTRAINTS: &[u8] = &[0x55, 0x1d, 0x13];
const OID_AUTHORITY_KEY_ID: &[u8] = &[0x55, 0x1d, 0x23];
const OID_EXTENDED_KEY_USAGE: &[u8] = &[0x55, 0x1d, 0x25];
const OID_SERVER_AUTH: &[u8] = &[0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x03, 0x01];
const OID_CLIENT_AUTH: &[u8] = &[0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x03, 0x02];

const BOOLEAN: u8 = 0x01;
const INTEGER: u8 = 0x02;
const BIT_STRING: u8 = 0x03;
const OCTET_STRING: u8 = 0x04;
const OID: u8 = 0x06;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;
const SEQUENCE: u8 = 0x30;
const EXPLICIT_0: u8 = 0xa0;
const EXPLICIT_3: u8 = 0xa3;

/// A name in the leaf's subjectAltName.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Name<'a> {
    Uri(&'a str),
    Dns(&'a str),
    Ip(IpAddr),
}

/// Everything a leaf consists of. Times are seconds since 1970.
#[derive(Debug)]
pub(super) struct Leaf<'a> {
    pub(super) names: &'a [Name<'a>],
    /// SubjectPublicKeyInfo, DER.
    pub(super) public_key: &'a [u8],
    pub(super) key_id: &'a [u8],
    /// RSA keys may also encipher, which old peers ask for.
    pub(super) rsa: bool,
    pub(super) not_before: u64,
    pub(super) not_after: u64,
    /// The CA's subject, DER.
    pub(super) issuer: &'a [u8],
    pub(super) issuer_key_id: Option<&'a [u8]>,
    /// AlgorithmIdentifier of the CA's signature, DER.
    pub(super) signature_algorithm: &'a [u8],
}

impl Leaf<'_> {
    /// The part that is signed (TBSCertificate).
    pub(super) fn to_be_signed(&self, serial: &[u8; 16]) -> Vec<u8> {
        let version_3 = tlv(EXPLICIT_0, &tlv(INTEGER, &[2]));
        let validity = sequence(&[&time(self.not_before), &time(self.not_after)]);
        let no_subject = sequence(&[]);
        sequence(&[
            &version_3,
            &tlv(INTEGER, serial),
            self.signature_algorithm,
            self.issuer,
            &validity,
            &no_subject,
            self.public_key,
            &tlv(EXPLICIT_3, &self.extensions()),
        ])
    }

    fn extensions(&self) -> Vec<u8> {
        let usage: &[u8] = if self.rsa { &[5, 0b1010_0000] } else { &[7, 0b1000_0000] };
        let purposes = sequence(&[&tlv(OID, OID_SERVER_AUTH), &tlv(OID, OID_CLIENT_AUTH)]);
        let names: Vec<u8> = self.names.iter().flat_map(general_name).collect();
        let mut extensions = vec![
            extension(OID_KEY_USAGE, true, &tlv(BIT_STRING, usage)),
            extension(OID_EXTENDED_KEY_USAGE, false, &purposes),
            extension(OID_BASIC_CONSTRAINTS, true, &sequence(&[])),
            extension(OID_SUBJECT_KEY_ID, false, &tlv(OCTET_STRING, self.key_id)),
        ];
        if let Some(id) = self.issuer_key_id {
            extensions.push(extension(OID_AUTHORITY_KEY_ID, false, &sequence(&[&tlv(0x80, id)])));
        }
        // Critical because the subject is empty (RFC 5280, 4.2.1.6).
        extensions.push(extension(OID_SUBJECT_ALT_NAME, true, &tlv(SEQUENCE, &names)));
        tlv(SEQUENCE, &extensions.concat())
    }
}

/// Puts the signature beside what it signs.
pub(super) fn certificate(to_be_signed: &[u8], signature_algorithm: &[u8], signature: &[u8]) -> Vec<u8> {
    let bits: Vec<u8> = std::iter::once(0).chain(signature.iter().copied()).collect();
    sequence(&[to_be_signed, signature_algorithm, &tlv(BIT_STRING, &bits)])
}

/// Random, positive and of fixed length.
pub(super) fn random_serial() -> [u8; 16] {
    let mut serial: [u8; 16] = rand::rng().random();
    serial[0] = serial[0] & 0x7f | 0x40;
    serial
}

/// AlgorithmIdentifier from the OID's content; RSA's carry a NULL.
pub(super) fn algorithm(oid: &[u8], null: bool) -> Vec<u8> {
    sequence(&[&tlv(OID, oid), if null { &[0x05, 0x00] } else { &[] }])
}

fn extension(oid: &[u8], critical: bool, value: &[u8]) -> Vec<u8> {
    let critical: &[u8] = if critical { &[BOOLEAN, 1, 0xff] } else { &[] };
    sequence(&[&tlv(OID, oid), critical, &tlv(OCTET_STRING, value)])
}

fn general_name(name: &Name<'_>) -> Vec<u8> {
    match name {
        Name::Uri(uri) => tlv(0x86, uri.as_bytes()),
        Name::Dns(name) => tlv(0x82, name.as_bytes()),
        Name::Ip(IpAddr::V4(address)) => tlv(0x87, &address.octets()),
        Name::Ip(IpAddr::V6(address)) => tlv(0x87, &address.octets()),
    }
}

/// RFC 5280: UTCTime up to 2049, GeneralizedTime from then on.
fn time(seconds: u64) -> Vec<u8> {
    let (year, month, day) = date(seconds / 86_400);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let rest = format!("{month:02}{day:02}{hour:02}{minute:02}{second:02}Z");
    if year < 2050 {
        tlv(UTC_TIME, format!("{:02}{rest}", year % 100).as_bytes())
    } else {
        tlv(GENERALIZED_TIME, format!("{year:04}{rest}").as_bytes())
    }
}

/// Year, month and day of a day since 1970 (Hinnant's algorithm: years that begin in March, eras of 400 years).
fn date(day: u64) -> (u64, u64, u64) {
    let day = day + 719_468;
    let (era, of_era) = (day / 146_097, day % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * of_year + 2) / 153;
    let month = if march_month < 10 {
        march_month + 3
    } else {
        march_month - 9
    };
    (
        era * 400 + year_of_era + u64::from(month <= 2),
        month,
        of_year - (153 * march_month + 2) / 5 + 1,
    )
}

fn sequence(parts: &[&[u8]]) -> Vec<u8> {
    tlv(SEQUENCE, &parts.concat())
}

fn tlv(tag: u8, content: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(content.len() + 4);
    out.push(tag);
    let length = content.len().to_be_bytes();
    let significant = &length[length.iter().take_while(|byte| **byte == 0).count()..];
    match significant {
        [] => out.push(0),
        [short] if *short < 0x80 => out.push(*short),
        long => {
            out.push(0x80 | long.len() as u8);
            out.extend_from_slice(long);
        }
    }
    out.extend_from_slice(content);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, text) in [
            (0, "700101000000Z"),
            (951_782_399, "000228235959Z"),
            (951_782_400, "000229000000Z"),
            (1_709_251_199, "240229235959Z"),
            (1_709_251_200, "240301000000Z"),
            (2_524_607_999, "491231235959Z"),
            (2_524_608_000, "20500101000000Z"),
            (4_107_542_400, "21000301000000Z"),
        ] {
            assert_eq!(&time(seconds)[2..], text.as_bytes(), "{seconds}");
        }
    }

    #[test]
    fn lengths_take_the_shortest_form() {
        assert_eq!(tlv(4, &[])[..], [4, 0]);
        assert_eq!(tlv(4, &[0; 127])[..2], [4, 127]);
        assert_eq!(tlv(4, &[0; 128])[..3], [4, 0x81, 128]);
        assert_eq!(tlv(4, &[0; 256])[..4], [4, 0x82, 1, 0]);
        assert_eq!(tlv(4, &[0; 65_536])[..5], [4, 0x83, 1, 0, 0]);
    }

    #[test]
    fn serials_are_positive_and_differ() {
        let (a, b) = (random_serial(), random_serial());
        assert_ne!(a, b);
        assert!((0x40..0x80).contains(&a[0]));
    }
}
