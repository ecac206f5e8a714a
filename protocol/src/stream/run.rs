//! The payload of an Items frame: n × (varint length, bytes).

use bytes::{Buf, Bytes};

use crate::error::Violation;
use crate::limits::ITEM_OVERHEAD;

/// Bytes of the longest length prefix: a canonical varint of a `u32`.
pub const MAX_PREFIX: usize = 5;

/// The canonical varint of `value`: its bytes and how many of them count.
const fn varint(mut value: u32) -> ([u8; MAX_PREFIX], usize) {
    let mut bytes = [0; MAX_PREFIX];
    let (mut rest, mut length): (&mut [u8], usize) = (&mut bytes, 0);
    while let Some((byte, after)) = rest.split_first_mut() {
        *byte = (value & 0x7f) as u8;
        value >>= 7;
        length = length.saturating_add(1);
        if value == 0 {
            break;
        }
        *byte |= 0x80;
        rest = after;
    }
    (bytes, length)
}

/// Reads a canonical varint off the front: its value and length. `None` if it is cut, longer than needed, or above
/// 2^32 − 1.
#[inline]
fn read_varint(bytes: &[u8]) -> Option<(u32, usize)> {
    if let Some(&first @ 0..=0x7f) = bytes.first() {
        return Some((u32::from(first), 1));
    }
    let mut value = 0u64;
    for (index, &byte) in bytes.iter().take(MAX_PREFIX).enumerate() {
        value |= u64::from(byte & 0x7f) << index.saturating_mul(7);
        if byte & 0x80 == 0 {
            // A last byte of zero adds nothing: a shorter form exists. [stream.items.canonical]
            let canonical = byte != 0;
            return u32::try_from(value).ok().filter(|_| canonical).map(|value| (value, index.saturating_add(1)));
        }
    }
    None
}

/// Appends one item, its length in front.
///
/// # Panics
/// When the item has 4 GiB or more; callers check the peer's `max_item`, which is a `u32`, first.
#[inline]
pub fn write_item(buffer: &mut Vec<u8>, item: &[u8]) {
    write_length(buffer, item.len());
    buffer.extend_from_slice(item);
}

/// Appends one item of so many bytes that lies in pieces.
pub(crate) fn write_pieces<'a>(buffer: &mut Vec<u8>, bytes: usize, pieces: impl Iterator<Item = &'a [u8]>) {
    write_length(buffer, bytes);
    pieces.for_each(|piece| buffer.extend_from_slice(piece));
}

/// Appends an item's length, and makes room for the item.
#[inline]
fn write_length(buffer: &mut Vec<u8>, bytes: usize) {
    let length = u32::try_from(bytes).expect("items are bounded by a u32");
    buffer.reserve(MAX_PREFIX.saturating_add(bytes));
    if length <= 0x7f {
        buffer.push(length as u8);
    } else {
        let (prefix, length) = varint(length);
        buffer.extend_from_slice(prefix.get(..length).unwrap_or_default());
    }
}

/// Frames the item behind the first [`MAX_PREFIX`] bytes of `buffer` where it is: writes its length right before it, and
/// returns where the framed item begins.
///
/// # Panics
/// When the buffer is shorter than a prefix, or the item has 4 GiB or more; see [`write_item`].
#[inline]
pub fn frame_in_place(buffer: &mut [u8]) -> usize {
    let (room, item) = buffer.split_at_mut(MAX_PREFIX);
    let length = u32::try_from(item.len()).expect("items are bounded by a u32");
    if let ([.., last], 0..=0x7f) = (&mut *room, length) {
        *last = length as u8;
        return MAX_PREFIX.saturating_sub(1);
    }
    let (prefix, used) = varint(length);
    let start = MAX_PREFIX.saturating_sub(used);
    room.iter_mut().skip(start).zip(prefix).for_each(|(byte, of)| *byte = of);
    start
}

/// 1..n whole items in the form in which they are framed.
///
/// The type is the proof that they were checked: each item is whole and within the limit that was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ItemRun {
    bytes: Bytes,
    items: u32,
    item_bytes: u64,
}

impl ItemRun {
    /// Checks the payload of an Items frame.
    ///
    /// # Errors
    /// When there is no item, an item is cut or its length is not a canonical varint, or one is above `max_item` bytes.
    /// `[stream.items.whole]`
    pub fn parse(bytes: Bytes, max_item: u32) -> Result<Self, Violation> {
        let mut rest: &[u8] = &bytes;
        let (mut items, mut item_bytes) = (0u32, 0u64);
        while !rest.is_empty() {
            let (length, prefix) = read_varint(rest).ok_or(Violation::Items("a length is not a canonical varint"))?;
            if length > max_item {
                let (value, limit) = (u64::from(length), u64::from(max_item));
                return Err(Violation::AboveLimit { what: "item", value, limit });
            }
            let end = prefix.saturating_add(length as usize);
            rest = rest.get(end..).ok_or(Violation::Items("the last item is cut"))?;
            // Each item takes at least one byte of a frame, whose length is a u32.
            items = items.saturating_add(1);
            item_bytes = item_bytes.saturating_add(u64::from(length));
        }
        if items == 0 {
            return Err(Violation::Items("there is no item"));
        }
        Ok(ItemRun { bytes, items, item_bytes })
    }

    /// A run of what this side framed itself.
    pub(crate) const fn trusted(bytes: Bytes, items: u32, item_bytes: u64) -> Self {
        ItemRun { bytes, items, item_bytes }
    }

    /// Items that are left.
    pub const fn items(&self) -> u32 {
        self.items
    }

    /// Bytes of the items that are left, without their lengths: what is metered.
    pub const fn item_bytes(&self) -> u64 {
        self.item_bytes
    }

    /// Credit that the items that are left cost. `[stream.credit.overhead]`
    pub const fn credit(&self) -> u64 {
        self.item_bytes.saturating_add((self.items as u64).saturating_mul(ITEM_OVERHEAD))
    }

    /// The credit that is used when these items have come, too, of which `used` was before and `limit` is granted.
    ///
    /// # Errors
    /// When an item started without credit: the last one may pass the limit, if it started below it.
    /// `[stream.credit.start]`
    pub fn check_credit(&self, used: u64, limit: u64) -> Result<u64, Violation> {
        let after = used.saturating_add(self.credit());
        if after > limit {
            let (mut rest, mut started) = (self.clone(), used);
            while let Some(length) = rest.next_length() {
                if started >= limit {
                    return Err(Violation::NoCredit { what: "item" });
                }
                started = started.saturating_add(u64::from(length)).saturating_add(ITEM_OVERHEAD);
                rest.skip();
            }
        }
        Ok(after)
    }

    /// The framed form of the items that are left.
    pub const fn as_bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The same run in memory of its own, so that it doesn't pin the block that it was read into.
    pub fn detached(&self) -> Self {
        ItemRun { bytes: Bytes::copy_from_slice(&self.bytes), ..*self }
    }

    /// Takes the next item.
    pub fn next_item(&mut self) -> Option<Bytes> {
        let (length, prefix) = read_varint(&self.bytes)?;
        self.bytes.advance(prefix);
        let item = self.bytes.split_to(length as usize);
        self.items = self.items.saturating_sub(1);
        self.item_bytes = self.item_bytes.saturating_sub(u64::from(length));
        Some(item)
    }

    /// Hands the next item to `read`, which costs no reference count, and takes it when that returns.
    #[inline]
    pub fn read_next<T>(&mut self, read: impl FnOnce(&[u8]) -> T) -> Option<T> {
        let (length, prefix) = read_varint(&self.bytes)?;
        let end = prefix.saturating_add(length as usize);
        let value = read(self.bytes.get(prefix..end)?);
        self.bytes.advance(end);
        self.items = self.items.saturating_sub(1);
        self.item_bytes = self.item_bytes.saturating_sub(u64::from(length));
        Some(value)
    }

    /// Leaves the next item out.
    pub(crate) fn skip(&mut self) {
        self.read_next(|_item| ());
    }

    /// The length in bytes of the next item.
    pub(crate) fn next_length(&self) -> Option<u32> {
        read_varint(&self.bytes).map(|(length, _)| length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lengths_are_canonical_at_every_boundary() {
        for value in [0, 1, 0x7f, 0x80, 0x3fff, 0x4000, 0x1f_ffff, 0x20_0000, 0xfff_ffff, 0x1000_0000, u32::MAX] {
            let (bytes, length) = varint(value);
            assert_eq!(read_varint(&bytes[..length]), Some((value, length)), "{value:#x}");
            assert_eq!(postcard::to_allocvec(&value).unwrap(), &bytes[..length], "as postcard writes it");
            for cut in 0..length {
                assert_eq!(read_varint(&bytes[..cut]), None);
            }
        }
        assert_eq!(read_varint(&[0x80, 0]), None, "longer than needed");
        assert_eq!(read_varint(&[0xff, 0xff, 0xff, 0xff, 0x10]), None, "above 2^32 - 1");
        assert_eq!(read_varint(&[0xff, 0xff, 0xff, 0xff, 0xff, 0x01]), None, "six bytes");
    }

    #[test]
    fn an_item_that_is_framed_in_place_is_as_one_that_is_written() {
        for length in [0, 1, 0x7f, 0x80, 0x3fff, 0x4000, 0x1f_ffff, 0x20_0000] {
            let mut place = vec![9; MAX_PREFIX + length];
            let start = frame_in_place(&mut place);
            let mut written = Vec::new();
            write_item(&mut written, &vec![9; length]);
            assert_eq!(place[start..], written, "{length} bytes");
        }
    }

    #[test]
    fn a_run_without_an_item_a_cut_item_and_a_large_item_are_refused() {
        assert!(ItemRun::parse(Bytes::new(), 10).is_err());
        assert!(ItemRun::parse(Bytes::from_static(&[3, 1, 2]), 10).is_err());
        assert!(ItemRun::parse(Bytes::from_static(&[2, 1, 2]), 2).is_ok());
        let over = ItemRun::parse(Bytes::from_static(&[2, 1, 2]), 1);
        assert_eq!(over, Err(Violation::AboveLimit { what: "item", value: 2, limit: 1 }));
    }

    proptest! {
        #[test]
        fn items_come_back_as_they_were_written(items in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 1..40)) {
            let mut buffer = Vec::new();
            items.iter().for_each(|item| write_item(&mut buffer, item));
            let mut run = ItemRun::parse(Bytes::from(buffer), 300).unwrap();
            prop_assert_eq!(run.items() as usize, items.len());
            prop_assert_eq!(run.item_bytes() as usize, items.iter().map(Vec::len).sum::<usize>());
            for item in &items {
                let read = match item.len() % 2 {
                    0 => run.read_next(<[u8]>::to_vec),
                    _ => run.next_item().map(Vec::from),
                };
                prop_assert_eq!(read.as_ref(), Some(item));
            }
            prop_assert_eq!((run.items(), run.item_bytes(), run.next_item()), (0, 0, None));
        }

        #[test]
        fn no_bytes_make_the_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            if let Ok(mut run) = ItemRun::parse(Bytes::from(bytes), 32) {
                let items = run.items();
                let mut count = 0;
                while run.next_item().is_some() { count += 1 }
                prop_assert_eq!(count, items);
            }
        }
    }
}
