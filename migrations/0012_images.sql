-- What operators call a product elsewhere, what is searched, its images, and how nodes learn that
-- the catalogue has changed.
ALTER TABLE products
    ADD COLUMN sku text CHECK (sku ~ '^[A-Za-z0-9][A-Za-z0-9._/-]{0,63}$');
CREATE UNIQUE INDEX products_sku ON products (sku);
-- 'simple': product names are in no one language.
CREATE INDEX products_words ON products USING gin (
    to_tsvector('simple', name || ' ' || description || ' ' || coalesce(sku, ''))
);
COMMENT ON INDEX products_words IS 'What the search looks at: words of name, description and SKU.';
COMMENT ON COLUMN products.sku IS 'The operator''s own number of the product; of one product only.';

CREATE TABLE product_images (
    id       uuid           PRIMARY KEY,
    product  uuid           NOT NULL REFERENCES products ON DELETE CASCADE,
    place    smallint       NOT NULL CHECK (place BETWEEN 0 AND 7),
    width    integer        NOT NULL CHECK (width > 0),
    height   integer        NOT NULL CHECK (height > 0),
    source   bytea          NOT NULL CHECK (length(source) = 32),
    added_at timestamptz(3) NOT NULL,
    -- Deferred, so that two images can change places.
    UNIQUE (product, place) DEFERRABLE INITIALLY DEFERRED,
    UNIQUE (product, source)
);
COMMENT ON TABLE product_images IS 'An image of a product; eight at most of each.';
COMMENT ON COLUMN product_images.place IS '0 is shown first. Gaps mean nothing.';
COMMENT ON COLUMN product_images.width IS 'Pixels of the upload, turned upright.';
COMMENT ON COLUMN product_images.source IS 'SHA-256 of the upload, which is not kept: the same file again adds nothing.';

CREATE TABLE image_renditions (
    image      uuid    NOT NULL REFERENCES product_images ON DELETE CASCADE,
    width      integer NOT NULL CHECK (width > 0),
    height     integer NOT NULL CHECK (height > 0),
    hash       bytea   NOT NULL CHECK (length(hash) = 32),
    media_type text    NOT NULL CHECK (media_type IN ('image/jpeg', 'image/webp')),
    bytes      bytea   NOT NULL CHECK (length(bytes) > 0),
    PRIMARY KEY (image, width)
);
-- They are compressed already.
ALTER TABLE image_renditions ALTER COLUMN bytes SET STORAGE EXTERNAL;
-- An address is a hash. Two products may have the same picture.
CREATE INDEX image_renditions_hash ON image_renditions (hash);
COMMENT ON TABLE image_renditions IS 'An image in one size, made anew from the pixels: nothing of the upload''s metadata is in it.';
COMMENT ON COLUMN image_renditions.hash IS 'SHA-256 of bytes: the address, under which nothing else will ever be.';

-- Nodes compare it, at most once a second, with the one that what they hold belongs to.
CREATE TABLE catalogue (
    one        boolean PRIMARY KEY DEFAULT true CHECK (one),
    generation uuid    NOT NULL
);
INSERT INTO catalogue (generation) VALUES (gen_random_uuid());
COMMENT ON TABLE catalogue IS 'One row: another generation with every change of products or images.';
COMMENT ON COLUMN catalogue.generation IS 'Random, so that a restored backup never repeats one. It changes in the transaction of the change: who sees it sees the change.';

CREATE FUNCTION catalogue_changed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE catalogue SET generation = gen_random_uuid();
    RETURN NULL;
END
$$;
CREATE TRIGGER catalogue_changed AFTER INSERT OR UPDATE OR DELETE ON products
    FOR EACH STATEMENT EXECUTE FUNCTION catalogue_changed();
CREATE TRIGGER catalogue_changed AFTER INSERT OR UPDATE OR DELETE ON product_images
    FOR EACH STATEMENT EXECUTE FUNCTION catalogue_changed();
