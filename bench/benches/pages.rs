//! The hot paths of a page: zero check, name, literal, manifest.

use bench::{random_pages, structured_pages};
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use migration_proto::limits::LITERAL_BATCH_PAGES;
use migration_proto::literal;
use migration_proto::manifest::Entry;
use migration_proto::wire::{Message, Region, decode, encode};
use page::{Domain, Gfn, PAGE_SIZE, PageHash, REGION_PAGES, RegionId, is_zero};
use sha2::{Digest, Sha256};

fn names(c: &mut Criterion) {
    let pages = random_pages(LITERAL_BATCH_PAGES, 1);
    let domain = Domain::unkeyed();
    let mut group = c.benchmark_group("hash");
    group.throughput(Throughput::Bytes((pages.len() * PAGE_SIZE) as u64));
    group.bench_function("name", |b| {
        b.iter(|| pages.iter().map(|page| domain.name(page)).collect::<Vec<_>>())
    });
    group.bench_function("crate sha2", |b| {
        b.iter(|| pages.iter().map(Sha256::digest).collect::<Vec<_>>());
    });
    let zero = vec![[0; PAGE_SIZE]; LITERAL_BATCH_PAGES];
    group.bench_function("zero check of zero pages", |b| {
        b.iter(|| zero.iter().filter(|page| is_zero(page)).count())
    });
    group.bench_function("zero check of other pages", |b| {
        b.iter(|| pages.iter().filter(|page| is_zero(page)).count())
    });
    group.finish();
}

fn literals(c: &mut Criterion) {
    let mut group = c.benchmark_group("literal batch");
    for (kind, pages) in [
        ("incompressible", random_pages(LITERAL_BATCH_PAGES, 2)),
        ("structured", structured_pages(LITERAL_BATCH_PAGES, 3)),
    ] {
        let batch: Vec<_> = (0..).map(Gfn).zip(&pages).collect();
        let encoded = literal::encode(&batch);
        group.throughput(Throughput::Bytes((pages.len() * PAGE_SIZE) as u64));
        group.bench_function(format!("encode {kind}"), |b| b.iter(|| literal::encode(&batch)));
        group.bench_function(format!("decode {kind}"), |b| b.iter(|| literal::decode(&encoded)));
    }
    group.finish();
}

fn manifest(c: &mut Criterion) {
    let domain = Domain::unkeyed();
    let entries: Vec<(Gfn, Entry)> = random_pages(REGION_PAGES, 4)
        .iter()
        .zip(0..)
        .map(|(page, gfn)| (Gfn(gfn), Entry::Name(domain.name(page).short())))
        .collect();
    let region =
        Message::Region(Region { region: RegionId(0), pushed: false, entries, root: PageHash([0; 32]) });
    let bytes = encode(&region);
    let mut group = c.benchmark_group("manifest of a region");
    group.throughput(Throughput::Elements(REGION_PAGES as u64));
    group.bench_function("encode", |b| b.iter(|| encode(&region)));
    group.bench_function("decode", |b| {
        b.iter_batched(|| &bytes, |bytes| decode(bytes), BatchSize::SmallInput)
    });
    group.finish();
}

criterion_group!(benches, names, literals, manifest);
criterion_main!(benches);
